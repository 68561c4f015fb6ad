"""What an attacker sees, and what can be made of it: films, identities, weights."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "ciphertexts": ["ATTACKS", "SENT", "recover_key", "weights_from_replies"],
        "estimate": ["LinearEstimator", "sketch_state"],
        "identify": ["Rate", "clipped_gradients", "diagnosis_bound", "diagnosis_rate", "gram", "membership_recall", "orthogonal_rate", "rero_bound", "top1_rate"],
        "imprint": ["imprint_state", "marked_state", "read_imprint"],
        "inversion": ["Reconstruction", "cosine_distance", "deep_leakage", "dense_layer", "expected_update", "infer_labels", "invert_gradients"],
        "prior": ["FilmPrior", "class_image", "head_features", "invert_features", "map_films"],
        "simulate": ["clipping_alone", "initial_state", "observe"],
        "view": ["AttackerView", "ThreatModel"],
    },
)
