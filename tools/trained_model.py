"""The task metric of a trained transformer in float and in INT8: masked residues of antibodies, by AntiBERTy.

    pip install --no-deps --target out/antiberty antiberty==0.1.3        94 MB; it ships the weights
    python tools/trained_model.py out/antiberty

Each residue of six variable domains is masked in turn. The metric is the share that the model gets right, and the mean
negative log-likelihood. The sequences are of trastuzumab, adalimumab and rituximab: heavy chain, then light chain.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
import transformers
from tabulate import tabulate

import int8kit

DOMAINS = (
    "EVQLVESGGGLVQPGGSLRLSCAASGFNIKDTYIHWVRQAPGKGLEWVARIYPTNGYTRYADSVKGRFTISADTSKNTAYLQMNSLRAEDTAVYYCSRWGGDGFYAMDYWGQGTLVTVSS",
    "DIQMTQSPSSLSASVGDRVTITCRASQDVNTAVAWYQQKPGKAPKLLIYSASFLYSGVPSRFSGSRSGTDFTLTISSLQPEDFATYYCQQHYTTPPTFGQGTKVEIK",
    "EVQLVESGGGLVQPGRSLRLSCAASGFTFDDYAMHWVRQAPGKGLEWVSAITWNSGHIDYADSVEGRFTISRDNAKNSLYLQMNSLRAEDTAVYYCAKVSYLSTASSLDYWGQGTLVTVSS",
    "DIQMTQSPSSLSASVGDRVTITCRASQGIRNYLAWYQQKPGKAPKLLIYAASTLQSGVPSRFSGSGSGTDFTLTISSLQPEDVATYYCQRYNRAPYTFGQGTKVEIK",
    "QVQLQQPGAELVKPGASVKMSCKASGYTFTSYNMHWVKQTPGRGLEWIGAIYPGNGDTSYNQKFKGKATLTADKSSSTAYMQLSSLTSEDSAVYYCARSTYYGGDWYFNVWGAGTTVTVSA",
    "QIVLSQSPAILSASPGEKVTMTCRASSSVSYIHWFQQKPGSSPKPWIYATSNLASGVPVRFSGSGSGTSYSLTISRVEAEDAATYYCQQWTSNPPTFGGGTKLEIK",
)
ROWS = 40  # masked copies in one call


def load(folder: Path) -> tuple[torch.nn.Module, dict[str, int]]:
    """The model in float32, and the numbers of its tokens."""
    models = folder / "antiberty" / "trained_models"
    tokens = {line.strip(): number for number, line in enumerate((models / "vocab.txt").read_text().splitlines())}
    trained = models / "AntiBERTy_md_smooth"
    config = transformers.BertConfig.from_json_file(trained / "config.json")
    model = transformers.BertForMaskedLM(config)
    state = torch.load(trained / "pytorch_model.bin", map_location="cpu", weights_only=True)
    found = model.load_state_dict(state, strict=False)  # its heads for species are no part of the task
    assert not found.missing_keys
    return model.eval(), tokens


@torch.no_grad()
def metric(model: torch.nn.Module, tokens: dict[str, int]) -> tuple[int, int, float]:
    """Residues that the model gets right, all residues, and the mean negative log-likelihood."""
    right, total, loss = 0, 0, 0.0
    for domain in DOMAINS:
        row = torch.tensor([tokens["[CLS]"], *(tokens[residue] for residue in domain), tokens["[SEP]"]])
        for places in torch.arange(1, len(domain) + 1).split(ROWS):
            masked = row.repeat(len(places), 1)
            numbers = torch.arange(len(places))
            masked[numbers, places] = tokens["[MASK]"]
            scores = model(input_ids=masked, attention_mask=torch.ones_like(masked)).logits.float()
            likely = scores[numbers, places].log_softmax(-1)
            right += int((likely.argmax(-1) == row[places]).sum())
            loss -= float(likely[numbers, row[places]].sum())
        total += len(domain)
    return right, total, loss / total


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder into which pip has installed antiberty 0.1.3")
    model, tokens = load(parser.parse_args().folder)
    rows = []
    for name, policy in (("float32", None), ("default policy", int8kit.Policy()), ("every linear", lambda *_: True)):
        one = copy.deepcopy(model)
        layers = len(int8kit.quantize_(one, policy).replaced) if policy else 0
        right, total, loss = metric(one, tokens)
        rows.append((name, layers, f"{right} of {total}", f"{100 * right / total:.2f} %", f"{loss:.5f}"))
    print(tabulate(rows, ("linears in INT8", "layers", "right", "share", "mean loss")))


if __name__ == "__main__":
    main()
