"""Tiny networks with random weights in place of those that score pictures: a CLIP whose tokens are letters, in the layout of transformers
and as a plain network with open_clip's names, and a network of features.
"""

import json
import warnings
from collections import OrderedDict
from pathlib import Path

import torch
from torch import nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

SIDE, PATCH, WIDTH, HEADS, LAYERS, EMBEDDING, CONTEXT = 12, 4, 16, 2, 2, 12, 24
LETTERS = "abcdefghijklmnopqrstuvwxyz"
TOKENS = [*LETTERS, *(f"{x}</w>" for x in LETTERS), "<|startoftext|>", "<|endoftext|>"]


def clip_config() -> CLIPConfig:
    size = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": LAYERS}
    size |= {"num_attention_heads": HEADS, "projection_dim": EMBEDDING, "hidden_act": "gelu"}
    text = {"vocab_size": len(TOKENS), "max_position_embeddings": CONTEXT}
    text |= {"eos_token_id": len(TOKENS) - 1, "bos_token_id": len(TOKENS) - 2}
    vision = {"image_size": SIDE, "patch_size": PATCH}
    return CLIPConfig(
        text_config=text | size, vision_config=vision | size, projection_dim=EMBEDDING
    )


def write_clip(folder: Path) -> str:
    """Config, weights, tokenizer and preprocessor; returns the folder as text."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(TOKENS)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    files = (str(folder / "vocab.json"), str(folder / "merges.txt"))
    tokenizer = CLIPTokenizer(*files, model_max_length=CONTEXT)
    torch.manual_seed(0)
    CLIPModel(clip_config()).save_pretrained(folder)
    pixels = {"shortest_edge": SIDE}
    images = CLIPImageProcessor(size=pixels, crop_size={"height": SIDE, "width": SIDE})
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return str(folder)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        wide, narrow = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.mlp = nn.Sequential(OrderedDict(c_fc=wide, gelu=nn.GELU(), c_proj=narrow))

    def forward(self, x_NTD, mask_TT=None):
        y_NTD = self.ln_1(x_NTD)
        x_NTD = x_NTD + self.attn(y_NTD, y_NTD, y_NTD, attn_mask=mask_TT, need_weights=False)[0]
        return x_NTD + self.mlp(self.ln_2(x_NTD))


def blocks() -> nn.Module:
    transformer = nn.Module()
    transformer.resblocks = nn.ModuleList(Block() for _ in range(LAYERS))
    return transformer


class OpenClip(nn.Module):
    """The network that HPS v2 is, after the papers of CLIP and ViT: every parameter has the name that open_clip gives it."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = nn.Module()
        self.visual.conv1 = nn.Conv2d(3, WIDTH, PATCH, PATCH, bias=False)
        self.visual.class_embedding = nn.Parameter(torch.empty(WIDTH))
        self.visual.positional_embedding = nn.Parameter(
            torch.empty((SIDE // PATCH) ** 2 + 1, WIDTH)
        )
        self.visual.ln_pre, self.visual.ln_post = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.visual.transformer = blocks()
        self.visual.proj = nn.Parameter(torch.empty(WIDTH, EMBEDDING))
        self.token_embedding = nn.Embedding(len(TOKENS), WIDTH)
        self.positional_embedding = nn.Parameter(torch.empty(CONTEXT, WIDTH))
        self.transformer = blocks()
        self.ln_final = nn.LayerNorm(WIDTH)
        self.text_projection = nn.Parameter(torch.empty(WIDTH, EMBEDDING))
        self.logit_scale = nn.Parameter(torch.empty([]))
        generator = torch.Generator().manual_seed(5)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3, generator=generator)

    def forward(self, image_3HW, ids_T):
        """The cosine of an image, normalised, and a text that ends in its end token."""
        patches_TD = self.visual.conv1(image_3HW[None]).flatten(2).mT[0]
        x_TD = torch.cat([self.visual.class_embedding[None], patches_TD])
        x_NTD = self.visual.ln_pre(x_TD + self.visual.positional_embedding)[None]
        for block in self.visual.transformer.resblocks:
            x_NTD = block(x_NTD)
        picture_D = self.visual.ln_post(x_NTD[0, 0]) @ self.visual.proj
        t = len(ids_T)
        x_NTD = (self.token_embedding(ids_T) + self.positional_embedding[:t])[None]
        later_TT = torch.full((t, t), float("-inf")).triu(1)
        for block in self.transformer.resblocks:
            x_NTD = block(x_NTD, later_TT)
        text_D = self.ln_final(x_NTD[0, -1]) @ self.text_projection
        return torch.cosine_similarity(picture_D, text_D, dim=0)


def write_hps(path: Path) -> OpenClip:
    """The file of a network in the form of HPS_v2.1_compressed.pt, in half precision."""
    network = OpenClip().half().float().eval()
    torch.save({"state_dict": {k: v.half() for k, v in network.state_dict().items()}}, path)
    return network


class Features(nn.Module):
    """Mean colours of quarters of an image."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1)


def write_features(path: Path) -> None:
    """A TorchScript file as the Inception of FID is one, for images of any size."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(Features()).save(str(path))
