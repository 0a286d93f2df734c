"""Train the task classifier and write its weights into the package.

    pip install "vllm-kvcompress[train]"
    python tools/train_task_classifier.py

scikit-learn is needed here only. The weights are readable: a word or a pair of words, and what
it adds to the log-odds of "localization". Words are dropped at random while training, so that no
phrase hangs on one of its words; how strongly weights are held down is chosen by how well
phrases are told apart that the fit has not seen.
"""

import json
import re
from pathlib import Path
from random import Random

import numpy as np
from sklearn.feature_extraction import DictVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_score
from task_prompts import make, phrases

import vllm_kvcompress.policy
from vllm_kvcompress.policy.tasks import WEIGHTS, features

PROMPTS, SEED, DROPPED, RARE = 12_000, 0, 0.2, 20
STRENGTHS = (0.01, 0.03, 0.1, 0.3, 1.0)


def thinned(rng: Random, text: str) -> str:
    return re.sub(r"[A-Za-z]+", lambda m: "" if rng.random() < DROPPED else m[0], text)


def main() -> None:
    rng = Random(SEED)
    known = phrases(rng, 200)
    drawn = rng.choices(known, k=PROMPTS)
    texts = [thinned(rng, make(rng, *phrase)) for phrase in drawn]
    labels = np.array([label == "localization" for label, _ in drawn])
    groups = [known.index(phrase) for phrase in drawn]
    vectors = DictVectorizer()
    matrix = vectors.fit_transform(dict.fromkeys(sorted(features(t)), 1.0) for t in texts)
    vectors.restrict(np.flatnonzero(matrix.getnnz(axis=0) >= RARE), indices=True)
    matrix = matrix[:, matrix.getnnz(axis=0) >= RARE]
    best = (0.0, 0.0)
    for strength in STRENGTHS:
        model = LogisticRegression(C=strength, solver="liblinear", class_weight="balanced")
        unseen = cross_val_score(model, matrix, labels, groups=groups, cv=GroupKFold(8)).mean()
        print(f"C={strength}: {unseen:.1%} of unseen phrases right")
        best = max(best, (float(unseen), strength))
    model = LogisticRegression(C=best[1], solver="liblinear", class_weight="balanced")
    model.fit(matrix, labels)
    pairs = zip(vectors.get_feature_names_out(), model.coef_[0], strict=True)
    weights = {str(name): round(float(w), 3) for name, w in pairs if abs(w) >= 0.01}
    path = Path(vllm_kvcompress.policy.__file__).parent / WEIGHTS
    data = {"bias": round(float(model.intercept_[0]), 3), "weights": weights}
    path.write_text(json.dumps(data, indent=0) + "\n")
    print(f"{len(weights)} features in {path.name}")


if __name__ == "__main__":
    main()
