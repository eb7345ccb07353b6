"""What a model knows of each domain, and how that changed."""
