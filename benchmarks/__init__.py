"""Speed and memory beside what a user would pick instead, paired in one run; see README.md."""
