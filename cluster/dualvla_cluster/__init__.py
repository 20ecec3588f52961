"""A thin layer over Ray: connecting, resources, jobs. Knows dualvla.errors and dualvla.io only."""
