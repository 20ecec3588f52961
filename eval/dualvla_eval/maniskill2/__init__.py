"""Second backend: the original simulators of SAPIEN 2 (mani-skill2, SimplerEnv) behind the same interface."""
