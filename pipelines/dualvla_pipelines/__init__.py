"""The training side: prune, train, and the whole run. Knows dualvla and dualvla_cluster."""
