"""mlxgpt: train and sample a small GPT with MLX."""
