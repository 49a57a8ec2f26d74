"""One thread, no network, no trace in the user's caches."""

import os
import tempfile

# before anything imports torch, datasets or huggingface_hub, which read these once
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="fastpref-tests-")
