"""GPT models from config, scalar heads, and Hugging Face weights."""
