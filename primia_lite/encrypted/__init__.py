"""Diagnosis of encrypted films by CKKS: the client has films and key, the server the model."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "batch": ["BatchCNNPacking", "BatchLinearPacking"],
        "client": ["CkksClient"],
        "encrypted_sum": ["CkksAggregation", "read_upload"],
        "flooding": ["Flooding"],
        "keys": ["SecretKey"],
        "model_card": ["ModelCard", "prepare_film"],
        "packing": ["CNNPacking", "LinearPacking", "Packing"],
        "parameters": ["MAX_BITS_128", "Parameters", "choose", "rescaling_error_bits"],
        "reply_masks": ["Mask"],
        "seal": ["CiphertextError", "Context"],
        "server": ["CkksServer", "plan"],
        "wire": ["packing_from"],
    },
)
