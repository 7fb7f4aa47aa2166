"""MLPerf Training, LLaMA2-70B LoRA (`llama2_70b_lora`), on NVIDIA NeMo 2 and Megatron Core."""
