"""Cross-model feature fusion (section III-C), and what the ablations of section IV-B put in its place.

Yu, arXiv 2408.13845: the noise filter, four-head cross-attention (equations 4, 5), the dynamic cross-fusion (Figs. 4,
6); Tables I and II, positional encodings, the weights of the branches (Fig. 11).

A level of the detector is X (B, C, H, W), the DDPM's reconstructed features of the same level are Y (B, C_y, h, w).
"""

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from defectlab.networks.blocks import pick
from defectlab.networks.yolo.blocks import ConvBlock

POSITIONS = ("none", "sine")


# --- Noise filter: "spatial attention in the frequency domain" -------------------------------------------------------


class NoiseFilter(nn.Module):
    """FFT, spatial attention on the spectrum, inverse FFT; (B, C, H, W) -> the same shape, real, float32.

    "Inspired by MedSegDiff" (whose filter is one learned map for all images); the attention's input is not stated.
    Ours, as in CBAM (Woo et al. 2018): mean and largest amplitude over the channels, a 7x7 convolution and a sigmoid
    give one weight per frequency, shared by all channels. Amplitudes enter as log(1 + a), since they fall by orders of
    magnitude from the lowest frequency to the highest. Weights lie in 0..2 and start at 1, the identity; only their
    ratios count, since a batch norm follows.
    """

    def __init__(self, kernel: int = 7):
        super().__init__()
        self.border = kernel // 2
        self.place = nn.Conv2d(2, 1, kernel)
        nn.init.zeros_(self.place.weight)
        nn.init.zeros_(self.place.bias)

    def attention(self, spectrum: Tensor) -> Tensor:
        """Complex spectrum (B, C, H, W), zero frequency in the corner -> weights (B, 1, H, W), 0..2."""
        amplitude = spectrum.abs().log1p()
        both = torch.cat([amplitude.mean(1, keepdim=True), amplitude.amax(1, keepdim=True)], 1)  # (B, 2, H, W)
        return 2 * self.place(wrapped(both, self.border)).sigmoid()

    def forward(self, y: Tensor) -> Tensor:
        # The whole plane, not the half of `rfft2`: there the 7x7 neighbourhood would end at the zero frequency. A
        # frequency and its mirror image are one wave of a real map; taking the real part gives both their mean weight.
        with torch.autocast(y.device.type, enabled=False):
            spectrum = torch.fft.fft2(y.float(), norm="ortho")
            return torch.fft.ifft2(spectrum * self.attention(spectrum), norm="ortho").real


def wrapped(x: Tensor, border: int) -> Tensor:
    """(..., H, W) continued periodically by `border` on all sides, as a spectrum is; no `fftshift` is needed. Maps may
    be smaller than the border (P5 of a small image)."""
    rows, columns = (torch.arange(-border, side + border, device=x.device) % side for side in x.shape[-2:])
    return x[..., rows[:, None], columns]


# --- Attention: equations 4 and 5 ------------------------------------------------------------------------------------


def attention(query: Tensor, key: Tensor, value: Tensor, printed: bool = False) -> Tensor:
    """(B, heads, N, d), (B, heads, M, d), (B, heads, M, d) -> (B, heads, N, d): softmax(Q K^T / sqrt(d)) V (Vaswani et
    al. 2017), or, `printed`, equation 5 as printed: softmax(Q K^T) / sqrt(d) times V."""
    if query.device.type == "cpu" and query.dtype == torch.bfloat16:
        # In float32: forward and backward of the bf16 kernel take 1.6 times as long on a CPU (576 pixels, torch 2.11).
        with torch.autocast("cpu", enabled=False):
            return attention(query.float(), key.float(), value.float(), printed)
    if printed:
        return functional.scaled_dot_product_attention(query, key, value, scale=1.0) / query.shape[-1] ** 0.5
    return functional.scaled_dot_product_attention(query, key, value)


class MultiHeadAttention(nn.Module):
    """Equation 4: queries from a map (B, C, H, W), keys and values from (B, C, h, w) or, without it, from the first map
    (self-attention) -> (B, C, H, W).

    printed: see `attention`. positional: "sine" adds 2-D sinusoids to what queries and keys are made of, not to values.
    ValueError for channels that the heads do not divide, an unknown encoding, or sinusoids with C not divisible by 4.
    """

    def __init__(self, channels: int, heads: int = 4, printed: bool = False, positional: str = "none"):
        super().__init__()
        if channels % heads:
            raise ValueError(f"{channels} channels cannot be shared by {heads} heads: use a divisor of {channels}")
        if positional not in POSITIONS:
            raise ValueError(f"unknown positional encoding {positional!r}: use one of {', '.join(POSITIONS)}")
        if positional == "sine" and channels % 4:
            raise ValueError(f"sinusoids of rows and columns need channels divisible by 4, got {channels}")
        self.heads, self.printed, self.positional = heads, printed, positional
        self.query = nn.Linear(channels, channels)
        # ours: no bias, which would add the same number to all logits of a query and change nothing
        self.key = nn.Linear(channels, channels, bias=False)
        self.value = nn.Linear(channels, channels)
        # ours: equation 4 ends with the concatenation; the projection mixes the heads, as in Vaswani et al.
        self.output = nn.Linear(channels, channels)
        # ours: Xavier, as PyTorch's own attention. The default of `Linear`, a third of the variance, keeps the logits
        # near 0: attention is then almost uniform, and a cross-attention alone carries no position.
        for linear in (self.query, self.key, self.value, self.output):
            nn.init.xavier_uniform_(linear.weight)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        y = x if y is None else y
        parts = self.query(self.placed(x)), self.key(self.placed(y)), self.value(pixels(y))  # (B, N, C)
        query, key, value = (rearrange(part, "b n (heads d) -> b heads n d", heads=self.heads) for part in parts)
        heads = rearrange(attention(query, key, value, self.printed), "b heads n d -> b n (heads d)")
        return rearrange(self.output(heads), "b (h w) c -> b c h w", h=x.shape[2])

    def placed(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> pixels (B, H W, C), with their positions added where these are encoded."""
        if self.positional == "none":
            return pixels(x)
        from diffusers.models.embeddings import get_2d_sincos_pos_embed  # takes seconds to import

        # (H W, C): rows and columns run from 0 to 16 whatever the size, so that all levels share coordinates
        where = get_2d_sincos_pos_embed(x.shape[1], x.shape[2:], device=x.device, output_type="pt")
        return pixels(x) + where.to(x.dtype)


def pixels(x: Tensor) -> Tensor:
    return rearrange(x, "b c h w -> b (h w) c")


# --- Fusion of X and Y, once both have the same shape: Tables I and II -----------------------------------------------


class Fusion(nn.Module):
    """X and Y, both (B, C, H, W) -> (B, C, H, W). `weights`: see `LevelFusion.weights`; here none is learned."""

    def weights(self) -> dict[str, float]:
        return {}


class Sum(Fusion):
    """Table II, "Sum"."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class Concatenated(Fusion):
    """Table II, "Concat + Conv1x1"."""

    def __init__(self, channels: int):
        super().__init__()
        self.mix = nn.Conv2d(2 * channels, channels, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.mix(torch.cat([x, y], 1))


class WeightedSum(Fusion):
    """Table II, "Weighted sum", and the sum of the branches of Fig. 6. Ours: weights are a softmax, so that they sum to
    1 as in Fig. 11, and are equal at first."""

    def __init__(self, names: Sequence[str] = ("ddpm", "det")):
        super().__init__()
        self.names = tuple(names)
        self.logits = nn.Parameter(torch.zeros(len(names)))

    def add(self, maps: Sequence[Tensor]) -> Tensor:
        """One map of equal shape for each name, in their order -> the weighted sum."""
        return sum(weight * x for weight, x in zip(self.logits.softmax(0), maps, strict=True))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.add([y, x])

    def weights(self) -> dict[str, float]:
        return dict(zip(self.names, self.logits.softmax(0).tolist(), strict=True))


class DynamicCrossFusion(Fusion):
    """Fig. 6: three branches, X and Y "smoothed" by self-attention and the cross-attention of X on Y, joined by learned
    weights, plus X itself "for stable training". The switches are the columns of Table I; nothing set: the
    cross-attention alone.

    Args:
        dual: self-attention on X and on Y; without it these branches, where used, are X and Y.
        weighted: the branches' learned weights; without it, and with `dual`, their plain sum.
        residual: X is added, times a learned weight that starts at 1.
        norm: Y is normalised before the cross-attention. Ours: layer norm of each pixel's channels, which keeps the
            differences between images that a norm over the plane would take away.
        printed_scale, positional, heads: see `MultiHeadAttention`; the cross-attention has no positions (IV-B.2).
    """

    def __init__(
        self,
        channels: int,
        dual: bool = True,
        weighted: bool = True,
        residual: bool = True,
        norm: bool = True,
        printed_scale: bool = False,
        positional: str = "none",
        heads: int = 4,
    ):
        super().__init__()
        self.norm, self.alone = norm, not (dual or weighted)
        self.cross = MultiHeadAttention(channels, heads, printed_scale)
        self.refine_x, self.refine_y = (
            MultiHeadAttention(channels, heads, printed_scale, positional) if dual else nn.Identity() for _ in range(2)
        )
        self.shares = WeightedSum(("ddpm", "det", "cross")) if weighted else None
        self.kept = nn.Parameter(torch.ones(())) if residual else None

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        fused = self.cross(x, pixel_norm(y) if self.norm else y)
        if not self.alone:
            branches = [self.refine_y(y), self.refine_x(x), fused]
            fused = sum(branches) if self.shares is None else self.shares.add(branches)
        return fused if self.kept is None else fused + self.kept * x

    def weights(self) -> dict[str, float]:
        weights = {} if self.shares is None else self.shares.weights()
        return weights if self.kept is None else weights | {"residual": self.kept.item()}


def pixel_norm(y: Tensor) -> Tensor:
    """(B, C, H, W) -> the same shape, each pixel's channels with mean 0 and variance 1."""
    return functional.layer_norm(y.movedim(1, -1), y.shape[1:2]).movedim(-1, 1)


FUSIONS = {
    "dynamic": DynamicCrossFusion,
    "concat": lambda channels, **_: Concatenated(channels),
    "sum": lambda *_, **__: Sum(),
    "weighted_sum": lambda *_, **__: WeightedSum(),
}


# --- One level, all levels -------------------------------------------------------------------------------------------


class LevelFusion(nn.Module):
    """X (B, C, H, W) of the detector and Y (B, C_y, h, w) of the DDPM -> (B, C, H, W).

    Y is resized to H x W, filtered and projected to C channels, then fused with X. Ours: the filter comes before the
    projection, since Fig. 4 filters the reconstructed features, and after the resizing, since smaller maps are cheaper.
    The projection is a 1x1 convolution with a batch norm: without it, the unknown scale of the features would dominate
    the plain sum of Table II.

    fuse: "dynamic", or Table II's "concat", "sum", "weighted_sum". switches: of `DynamicCrossFusion`; the others ignore
    them. ValueError for an unknown fusion, and for what `MultiHeadAttention` refuses.
    """

    def __init__(
        self, channels: int, feature_channels: int, fuse: str = "dynamic", noise_filter: bool = True, **switches
    ):
        super().__init__()
        self.filter = NoiseFilter() if noise_filter else nn.Identity()
        self.project = ConvBlock(feature_channels, channels, activation=nn.Identity)
        self.fuse = pick(FUSIONS, fuse, "fusion")(channels, **switches)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.fuse(x, self.project(self.filter(resized(y, x.shape[-2:]))))

    def weights(self) -> dict[str, float]:
        """Fig. 11: the learned weights of "ddpm", "det", "cross" (sum one) and "residual", of those there are."""
        return self.fuse.weights()


def resized(y: Tensor, size: Sequence[int]) -> Tensor:
    """(B, C, h, w) -> (B, C, H, W), float32; bilinear, antialiased where it shrinks (in float32: no bf16 on CPUs)."""
    if y.shape[-2:] == tuple(size):
        return y.float()
    return functional.interpolate(y.float(), tuple(size), mode="bilinear", antialias=True)


class CrossModelFusion(nn.Module):
    """A `LevelFusion` for each level, finest first: maps (B, channels[k], H, W) of the detector's backbone and features
    (B, feature_channels[k], h, w) of the DDPM -> maps of the detector's shapes.

    ValueError where there are not as many feature levels as maps, and for what `LevelFusion` refuses.
    """

    def __init__(self, channels: Sequence[int], feature_channels: Sequence[int], **switches):
        super().__init__()
        if (maps := len(channels)) != (own := len(feature_channels)):
            raise ValueError(f"{maps} maps of the detector, {own} of the DDPM: give one each")
        pairs = zip(channels, feature_channels, strict=True)
        self.levels = nn.ModuleList(LevelFusion(*pair, **switches) for pair in pairs)

    def forward(self, maps: Sequence[Tensor], features: Sequence[Tensor]) -> list[Tensor]:
        return [level(x, y) for level, x, y in zip(self.levels, maps, features, strict=True)]

    def weights(self) -> list[dict[str, float]]:
        """`LevelFusion.weights` of each level."""
        return [level.weights() for level in self.levels]

    def mean_weights(self) -> dict[str, float]:
        """Mean over the levels of each weight."""
        levels = self.weights()
        return {name: sum(level[name] for level in levels) / len(levels) for name in levels[0]}
