"""What a trained model pays for each document: the measure by which ways of training are compared.

transformers computes it, not our own model: what is compared is then also what others will load.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch.nn import functional

from phimr_nemo.data.chat import load_tokenizer, render_conversation
from phimr_nemo.errors import UserError
from phimr_nemo.losses import IGNORED_LABEL
from phimr_nemo.model.files.hf import HFDirectory
from phimr_nemo.store.atomic import atomic_write_text
from phimr_nemo.store.provenance import content_of
from phimr_nemo.store.shards import read_table


def document_losses(model: Path, conversations: Path, *, device: str = "cpu") -> dict[str, float]:
    """The loss of each document: mean negative log-probability of its response's tokens, <|end|> included (nats).

    Every document counts alike in a mean over the result, however long it is; and since it is computed alone, it does
    not matter whether the model was trained packed or padded.

    Args:
        model: a Hugging Face directory.
        conversations: a finished `conversations` record directory with at least one row.
        device: where to compute.

    Returns:
        conversation id -> loss.

    Raises:
        UserError: there is no conversation, or the directories cannot be read.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    rows = read_table(conversations, "conversations", ["id", "question", "response"]).to_pylist()
    if not rows:
        raise UserError(
            f"{conversations} holds no conversation",
            rule="the loss is a mean over at least one document",
            remedy="ask the teacher for more problems",
        )
    tokenizer = load_tokenizer(model)
    # transformers 4 would pass over what transformers 5 has written into config.json.
    config = AutoConfig.for_model(**HFDirectory(model).architecture.to_hf_config())
    network = AutoModelForCausalLM.from_pretrained(model, config=config, torch_dtype=torch.float32)
    network.to(device).eval()
    losses = {}
    with torch.inference_mode():
        for row in rows:
            ids, mask = render_conversation(tokenizer, row["question"], row["response"])
            tokens = torch.tensor(ids, device=device)
            labels = tokens.masked_fill(torch.tensor(mask, device=device) == 0, IGNORED_LABEL)
            logits = network(input_ids=tokens[None]).logits[0, :-1]
            losses[row["id"]] = float(functional.cross_entropy(logits, labels[1:], ignore_index=IGNORED_LABEL))
    return losses


def kept_document_losses(model: Path, conversations: Path, path: Path) -> dict[str, float]:
    """:func:`document_losses`, computed once for these weights and documents and kept in `path`.

    Raises:
        UserError: as there.
    """
    key = {"weights": HFDirectory(model).weights_hash(), "documents": content_of(conversations)}
    if path.is_file():
        kept = json.loads(path.read_text("utf-8"))
        if {name: kept[name] for name in key} == key:
            return {str(name): float(loss) for name, loss in kept["losses"].items()}
    losses = document_losses(model, conversations)
    atomic_write_text(path, json.dumps({**key, "losses": losses}))
    return losses
