"""Speed and memory beside what a user would pick instead, paired in one run; see README.md."""

import memgen_lens  # noqa: F401  before torch: it sets how torch's threads wait, and contenders inherit it
