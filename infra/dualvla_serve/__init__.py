"""The serving side: a checkpoint behind Ray Serve. Knows dualvla and dualvla_cluster."""
