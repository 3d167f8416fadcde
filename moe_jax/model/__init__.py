"""Backbone, experts, router, decoding: pure functions under thin Flax modules."""
