"""Training side by side that shows FusedSE at work: ``senet-fused demo`` is :mod:`senet_fused.demo.digits`."""
