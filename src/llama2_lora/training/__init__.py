"""All that imports torch, Lightning, NeMo or Megatron. Nothing outside this package may."""
