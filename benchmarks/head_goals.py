"""Goals of the LM-head ops on one H200: milliseconds at N = 16,384, ratios to peers, error bounds.

Not measurements. The lower bound of a time is 2·N·D·V operations per pass at 790 TFLOP/s.
"""

PEAK_TFLOPS = 790.0

MILLISECONDS = {
    # job, contender: shape -> goal
    ("forward", "fastpref"): {"S1": 23, "S2": 18.5, "S3": 34, "S4": 7, "S5": 30},
    ("train", "fastpref large"): {"S1": 71, "S2": 49, "S3": 92, "S4": 20, "S5": 80},
    ("train", "fastpref"): {"S1": 95, "S2": 67, "S3": 126, "S4": 27, "S5": 110},
    ("frozen", "fastpref"): {"S1": 48, "S2": 34, "S3": 63, "S4": 13.5, "S5": 56},
    ("tdpo1", "fastpref large"): {"S1": 72, "S2": 49, "S4": 20, "S5": 80},
    ("tdpo1 frozen", "fastpref"): {"S1": 49, "S2": 35, "S4": 14.5, "S5": 57},
    ("tdpo2", "fastpref large"): {"S1": 98, "S2": 66, "S3": 124, "S4": 28, "S5": 108},
    ("tdpo2 frozen", "fastpref large"): {"S1": 76, "S2": 52, "S3": 98, "S4": 21, "S5": 86},
}
PASSES = {
    ("forward", "fastpref"): 1,
    ("train", "fastpref large"): 3,
    ("train", "fastpref"): 4,
    ("frozen", "fastpref"): 2,
    ("tdpo1", "fastpref large"): 3,
    ("tdpo1 frozen", "fastpref"): 2,
    ("tdpo2", "fastpref large"): 4,
    ("tdpo2 frozen", "fastpref large"): 3,
}
TIME_RATIOS = [
    # ours, peer, job, largest ratio of the times
    ("fastpref large", "TRL", "train", 0.78),
    ("fastpref", "TRL", "train", 1.05),
    ("fastpref", "TRL", "frozen", 0.62),
    ("fastpref large", "QuACK", "train", 1.15),
    ("fastpref large", "Liger CE", "train", 0.15),
    ("fastpref large", "Liger DPO", "train", 0.70),
    ("fastpref large", "CCE", "train", 0.50),
    ("fastpref large", "CCE filtered", "train", 0.80),
    ("fastpref large", "torch.compile", "train", 1.10),
    ("fastpref large", "TRL", "tdpo2", 0.39),
    ("fastpref large", "TRL", "tdpo1", 0.27),
    ("fastpref large", "TRL", "tdpo2 frozen", 0.35),
    ("fastpref", "TRL", "tdpo1 frozen", 0.22),
]
MEMORY_RATIOS = [
    ("fastpref", "TRL", "train", 0.21),
    ("fastpref", "QuACK", "train", 0.50),
    ("fastpref", "CCE", "train", 0.70),
    ("fastpref", "torch.compile", "train", 0.10),
    ("fastpref", "TRL", "tdpo2", 0.15),
    ("fastpref", "TRL", "tdpo1", 0.15),
]
ERRORS = {"logp_error": 3e-5, "logp_mean_error": 6e-6, "value_error": 5e-5}
"""Goals in nats: largest and mean error of a log-probability, mean error of a token's value. With
torch's float32-output GEMM the first two are 2.3e-5 and 5e-6 at D = 4,096 on an H200. A missed goal
is only reported; exceeding a bound below fails the run."""
LOGP_ERROR = 5e-5
"""Largest absolute error of a log-probability, nats."""
KL_ERROR = 1e-5
"""Mean absolute error of a KL, nats."""
VALUE_ERROR = 1e-4
"""Mean absolute error of a token's log-ratio plus KL, nats. For TDPO1 with different heads the KL
is computed from a mean of 16-bit weights."""
GRADIENT_ERROR = 3e-3
"""Relative error of a gradient, Frobenius norm."""


def missed(results: list[dict]) -> list[str]:
    """One line per goal that a run's results miss."""
    by_cell = {
        (row["shape"], row["rows"], row["job"], row["contender"]): row
        for row in results
        if row.get("milliseconds") is not None
    }
    lines = []
    for (shape, rows, job, contender), row in by_cell.items():
        goal = MILLISECONDS.get((job, contender), {}).get(shape)
        if goal is not None and rows == 16_384 and row["milliseconds"] > goal:
            floor = PASSES[job, contender] * row["pass_tflop"] / PEAK_TFLOPS * 1e3
            lines.append(
                f"{shape} {job} {contender}: {row['milliseconds']:.1f} ms, goal {goal} "
                f"({PASSES[job, contender]} passes at {PEAK_TFLOPS:.0f} TFLOP/s are {floor:.1f})"
            )
        lines += [
            f"{shape} N={rows} {job} {contender}, {name}: {row[name]:.1e}, goal {bound:.0e}"
            for name, bound in ERRORS.items()
            if contender.startswith("fastpref") and not row.get(name, 0.0) <= bound
        ]
    for table, field in [(TIME_RATIOS, "milliseconds"), (MEMORY_RATIOS, "extra_mib")]:
        for ours, peer, job, bound in table:
            for (shape, rows, cell_job, contender), row in by_cell.items():
                other = by_cell.get((shape, rows, job, peer))
                if contender != ours or cell_job != job or other is None:
                    continue
                ratio = row[field] / other[field]
                if ratio > bound:
                    cell = f"{shape} N={rows} {job} {ours} / {peer}"
                    lines.append(f"{cell}, {field}: {ratio:.2f}, goal {bound}")
    return lines
