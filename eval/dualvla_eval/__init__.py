"""The measuring side: suites, experts, rollouts, judges, reports. Knows dualvla and dualvla_cluster."""
