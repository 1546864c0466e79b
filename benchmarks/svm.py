"""Linear SVMs of the VOC07 evaluation: eval_svm.py's beside scikit-learn's LinearSVC called in turn.

    python benchmarks/svm.py

Both train one SVM per class and cost on each cross-validation fold, on all images, and on low-shot draws, and compute
decision values of the test images. The usual way gives the features as they are to LinearSVC, one fit after the
other; eval_svm.py gives it a triangular matrix of the same inner products, in as many processes as there are cores.
The features are rectified, partly correlated noise. Before the times are shown, all decision values of both must
agree to 1e-6. The products of all pairs of rows are computed once for all jobs and timed apart; the total has them, the
start of the processes it has not. An evaluation of 20 classes and 19 costs spreads the products over 1,160 fits and
more, the few classes and costs of this benchmark over fewer.
"""

import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import StratifiedKFold
from sklearn.svm import LinearSVC

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.timing import clock, in_turns, machine, parser, speed, table
from eval_svm import MAX_ITER, Triangle, decisions, draw, normalize, solve


def features(images, dim, classes):
    """Normalised rows (images, dim) and labels (images, classes), 1 or -1, of which one in eight is positive."""
    rng = np.random.default_rng(0)
    latent = rng.standard_normal((images, 64))
    x = latent @ rng.standard_normal((64, dim)) * 0.15 + rng.standard_normal((images, dim))
    score = latent[:, :classes] + 0.5 * rng.standard_normal((images, classes))
    x = normalize(torch.from_numpy(np.maximum(x, 0)))
    return x.numpy(), np.where(score > np.quantile(score, 7 / 8, axis=0), 1, -1)


def ours(x, gram, trainval, jobs, costs, workers):
    """Decision values (jobs, costs, test images)."""
    at, everything = np.arange(trainval, len(x)), None
    if any(len(rows) == trainval for rows, _ in jobs):
        everything = Triangle(gram[:trainval])
    shared = [everything if len(rows) == trainval else None for rows, _ in jobs]
    jobs = [(None, gram, *job, costs, at, 0, triangle) for job, triangle in zip(jobs, shared, strict=True)]
    return solve(flat_decisions, jobs, len(costs) * len(at), workers, "ours").reshape(len(jobs), len(costs), -1)


def flat_decisions(*job):
    return decisions(*job)[0].ravel()


def usual(x, gram, trainval, jobs, costs, workers):
    """The same in one process, from the features."""
    values = []
    for rows, positive in jobs:
        for cost in costs:
            svm = LinearSVC(C=cost, class_weight={1: 2, -1: 1}, dual=True, max_iter=MAX_ITER, random_state=0)
            values.append(svm.fit(x[rows], np.where(positive, 1, -1)).decision_function(x[trainval:]))
    return np.stack(values).reshape(len(jobs), len(costs), -1)


def main():
    flags = parser(__doc__, repeats=3, device=False)
    flags.add_argument("--trainval", type=int, default=5011, help="images")
    flags.add_argument("--test", type=int, default=1000, help="images")
    flags.add_argument("--dim", type=int, default=8192)
    flags.add_argument("--classes", type=int, default=2)
    flags.add_argument("--costs", type=float, nargs="+", default=[100, 10, 1, 0.0625, 1e-3, 1e-5])
    flags.add_argument("--k", type=int, nargs="*", default=[4, 32, 96])
    flags.add_argument("--draws", type=int, default=2)
    flags.add_argument("--jobs", type=int, default=torch.get_num_threads(), help="processes of ours; 1 with --cpu-time")
    args = flags.parse_args()
    seconds = clock(args)
    args.jobs = 1 if args.cpu_time else args.jobs
    warnings.simplefilter("ignore", ConvergenceWarning)

    print(machine())
    x, labels = features(args.trainval + args.test, args.dim, args.classes)
    labels = labels[: args.trainval]
    full, low = [], []
    for c in range(args.classes):
        positive = labels[:, c] == 1
        folds = [rows for rows, _ in StratifiedKFold(3).split(positive, positive)]
        full += [(rows, positive[rows]) for rows in [*folds, np.arange(args.trainval)]]
        draws = [draw(labels[:, c], k, number, c, 0) for k in args.k for number in range(args.draws)]
        low += [(rows, positive[rows]) for rows in draws]
    sets = {"full": full} | ({"low-shot": low} if low else {})
    counts = ", ".join(f"{len(jobs) * len(args.costs)} {name}" for name, jobs in sets.items())
    print(f"{args.trainval:,} x {args.dim:,} features, {args.classes} classes, costs {args.costs}, k {args.k}")
    print(f"{counts} fits, {args.test:,} test images, {args.jobs} processes of ours, {args.repeats} repeats")

    solve(flat_decisions, [(x[:9, :9], None, np.arange(9), np.arange(9) < 4, [1.0], [0], 0)] * 8, 1, args.jobs, "start")
    forms, largest = {"ours": ours, "usual": usual}, dict.fromkeys(sets, 0.0)
    times = {name: {form: [] for form in forms} for name in ("products", *sets, "total")}
    for order in in_turns(forms, args.repeats):
        values, gram = {}, None
        for form in order:
            began = seconds()
            if form == "ours":  # the usual way needs none
                gram = (torch.from_numpy(x) @ torch.from_numpy(x[: args.trainval]).T).numpy()
            spent = [seconds() - began]
            for name, jobs in sets.items():
                began = seconds()
                values[name, form] = forms[form](x, gram, args.trainval, jobs, args.costs, args.jobs)
                spent.append(seconds() - began)
            for name, part in zip(times, [*spent, sum(spent)], strict=True):
                times[name][form].append(part)
        for name in sets:
            largest[name] = max(largest[name], abs(values[name, "ours"] - values[name, "usual"]).max())
    print("decision values differ by at most " + ", ".join(f"{v:.1e} ({name})" for name, v in largest.items()))
    if not max(largest.values()) <= 1e-6:
        sys.exit("error: the two ways disagree: their times would not compare")

    table({"products of ours": times.pop("products")["ours"]}, "s")
    for name, both in times.items():
        print(f"\n{name}", end="")
        table(both, "s", columns=speed(both, "usual"))


if __name__ == "__main__":
    main()
