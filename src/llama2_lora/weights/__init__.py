"""Weights on disk: NeMo checkpoint and adapter (checkpoint), Hugging Face -> NeMo (convert), adapter -> PEFT (export)."""
