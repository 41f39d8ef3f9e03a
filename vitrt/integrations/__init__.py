"""Where the features go: transformers' own models, and serving engines."""
