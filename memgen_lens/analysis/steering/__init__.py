"""Change neurons at inference time, and judge what that does."""
