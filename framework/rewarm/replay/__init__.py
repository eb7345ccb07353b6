"""What a model was trained on before, and how it is fed back."""
