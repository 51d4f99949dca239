"""``senet-fused demo`` (:mod:`~senet_fused.demo.command`): one network trained with plain and with fused layers."""
