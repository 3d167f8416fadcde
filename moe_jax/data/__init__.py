"""The data path: SeqIO registry, cache, packing, Grain pipeline."""
