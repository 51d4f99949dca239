"""Training: ``senet-fused train``."""
