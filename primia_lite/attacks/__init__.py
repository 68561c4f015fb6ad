"""What an attacker sees, and what can be made of it: films, identities, weights."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "auditing": ["Finding", "audit"],
        "bounds": ["one_run_epsilon", "one_run_gaussian_epsilon", "two_sample_bounds"],
        "ciphertexts": ["ATTACKS", "SENT", "key_from_decryption", "recover_key", "weights_from_replies"],
        "estimate": ["LinearEstimator", "pca_weights"],
        "gradients": ["cosine_distance", "expected_update"],
        "identify": [
            "Rate",
            "clipped_gradients",
            "diagnosis_rate",
            "gram",
            "membership_recall",
            "orthogonal_rate",
            "rero_bound",
            "top1_rate",
        ],
        "imprint": ["ImprintReading", "imprint_weights", "orthogonal_weights"],
        "inversion": ["DeepLeakage", "DenseLayerInversion", "InvertingGradients", "reconstruct"],
        "labels": ["infer_labels"],
        "membership": ["lira", "shadow_runs", "true_positive_rate"],
        "prior": ["FeatureInversion", "FilmPrior", "MapEstimator", "class_image", "head_features"],
        "search": ["Reconstruction"],
        "simulate": ["clipping_alone", "initial_state", "simulate_view"],
        "suspects": ["SUSPECTS"],
        "view": ["AttackerView", "ThreatModel"],
    },
)
