"""What a user touches: launch, ingress, command line, benchmarks."""
