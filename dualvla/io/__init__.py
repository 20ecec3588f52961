"""Files: storage (local, s3, any fsspec URL), manifests, data sets. Knows nothing of the method."""
