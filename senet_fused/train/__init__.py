"""Training runs that show FusedSE at work: ``senet-fused demo`` is :mod:`senet_fused.train.digits`."""
