"""What a job will need before it runs: descriptions of clusters, predicted memory. No ranks, and no torch at import."""
