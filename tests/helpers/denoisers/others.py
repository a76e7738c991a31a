"""What is neither picture, video nor sound, and what is called a model but is a part of one."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from pipelines.parts import normal
from torch import Tensor

from denoisers.tiny import TinyDenoiser

RESIDUES, ATOMS, LATENT, KINDS = 8, 37, 4, 5


def _rfd4_proteina(x: Tensor, t: Tensor) -> dict[str, object]:
    """The trunk runs several times in a call. The pipeline says for each step how often."""
    time = 1 - t / 1000  # from noise at 0
    real = (torch.arange(RESIDUES) < RESIDUES - 1).repeat(len(x), 1)
    given = (torch.arange(RESIDUES) == 0).repeat(len(x), 1)
    molecules = (torch.arange(RESIDUES) // 4).repeat(len(x), 1)
    places = torch.arange(RESIDUES)
    return {
        "bb_ca": x[..., :3],
        "local_latents": x[..., 3 : 3 + LATENT],
        "bb_ca_time": time,
        "local_latents_time": time,
        "padding_mask": real,
        "token_type": molecules,
        "atom37_mask": torch.ones(len(x), RESIDUES, ATOMS, dtype=torch.bool),
        "conditioning": {
            "condition_sequence_1_residue": torch.zeros_like(molecules),
            "condition_rasa-binned_1_atom": normal("accessible surface", RESIDUES, ATOMS, batch=len(x)),
            "condition_ChainCentroid_1_atom": normal("centroid", RESIDUES, 3, batch=len(x)),
            "molecule_iid": molecules,
            "token_bond_path_length": (places[:, None] - places).abs().repeat(len(x), 1, 1),
            "is_in_context_conditioning": given,
            "supports_local_latent": torch.ones_like(real),
        },
        "recycle_depth": 2,
        "attention_kwargs": None,
    }


def _velocities(output: Any) -> Tensor:
    """And what is read of each residue's kind, which has no noisy state but is a part of the result."""
    return torch.cat([output.backbone, output.local_latents, output.sequence_logits], dim=-1)


DENOISERS = (
    TinyDenoiser(
        name="RFD4ProteinaTransformer",
        make=lambda: diffusers.RFD4ProteinaTransformer(
            nlayers=3, token_dim=16, nheads=2, dim_cond=8, pair_repr_dim=8, latent_dim=LATENT, token_type_emb_dim=4,
            t_emb_dim=8, seq_sep_dim=4, xt_pair_dist_dim=8, tri_mult_c=8, num_sequence_classes=KINDS,
            recycle_conditioning_dim=2,
            feats_seq=("xt_bb_ca", "xt_local_latents", "token_type", "rasa_binned", "chain_centroid_xyz"),
            feats_cond_seq=("time_emb_bb_ca", "time_emb_local_latents", "recycle_remaining"),
            feats_pair_repr=("xt_bb_ca_pair_dists", "molecule_idx_pair", "token_bond_path_length"),
        ),
        state=(RESIDUES, 3 + LATENT + KINDS),
        call=_rfd4_proteina,
        taken=_velocities,
    ),
)  # fmt: skip

NO_DENOISERS: dict[str, str] = {
    "TransformerTemporalModel": "A layer inside the U-Nets for video: it has neither a noisy state nor a time.",
}
