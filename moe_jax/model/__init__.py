"""`TaskMoE` and its parts: families, layers, experts, router, selection."""
