"""What a model is, apart from any engine: its architecture and its Hugging Face form."""
