"""Prints the table of networks in docs/fuse.md, as Markdown: python tests/peers/table.py"""

from __future__ import annotations

import os
import sys
import warnings

os.environ["HF_HUB_OFFLINE"] = "1"
warnings.simplefilter("ignore")

import torch  # noqa: E402
from models import PEERS, Peer  # noqa: E402

import senet_fused  # noqa: E402

HEAD = ("library", "network", "SE layers", "fused", "left", "kind", "why left")

LISTED = (
    "timm-seresnet50", "timm-seresnextaa101d_32x8d", "timm-legacy_senet154", "timm-mobilenetv3_large_100",
    "timm-efficientnet_b0", "timm-efficientnetv2_rw_t", "timm-regnety_016", "timm-ghostnet_100", "timm-dm_nfnet_f0",
    "timm-tresnet_m", "timm-gcvit_xxtiny", "timm-coatnet_0_rw_224", "timm-rexnet_100", "timm-ecaresnet26t",
    "timm-ResNet_cbam", "timm-ese_vovnet19b_slim_dw", "timm-gcresnet33ts", "timm-skresnet18",
    "torchvision-mobilenet_v3_large", "torchvision-efficientnet_v2_s", "torchvision-regnet_y_400mf",
    "MONAI-SEResNet50_3-D", "MONAI-SENet154_3-D", "MONAI-ResidualSELayer_3-D",
    "transformers-RegNetForImageClassification", "transformers-EfficientNetForImageClassification",
    "transformers-PPLCNetForImageClassification", "transformers-PPOCRV5MobileDetForObjectDetection",
    "transformers-ECAPA_TimeDelayNet", "smp-Unet_resnet18_scse", "smp-Unet_se_resnet50_scse",
    "pretrainedmodels-senet154", "pytorchcv-mobilenetv3_small_w7d20", "pytorchcv-ghostnet", "mmpretrain-SEResNet_50",
    "mmpretrain-MobileNetV3_small",
)  # fmt: skip


def row(peer: Peer) -> tuple[str, ...]:
    """A line of the table: the counts as fuse finds them, the reason as the tests hold it."""
    with torch.device("meta" if peer.on_meta else "cpu"):
        model = peer.build()
    layers = list(senet_fused.fuse_report(senet_fused.fuse(model, backend="cpu")))
    fused = sum(layer.fused for layer in layers)
    kinds = (f"{layer.kind.removesuffix(', by structure')}{' (gate)' * (layer.form == 'gate')}" for layer in layers)
    counts = map(str, (len(layers), fused, len(layers) - fused))
    return (peer.library, peer.name, *counts, ", ".join(dict.fromkeys(kinds)), peer.why)


def main() -> int:
    print(f"| {' | '.join(HEAD)} |")
    print("|---|---|---:|---:|---:|---|---|")
    peers = {str(peer): peer for peer in PEERS}
    for name in LISTED:
        print(f"| {' | '.join(row(peers[name]))} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
