"""The model family: a Hugging Face image-text-to-text backbone, action queries, adapters, an action head."""
