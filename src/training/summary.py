"""What a finished run of training writes about itself."""

SUMMARY = "training_summary.json"
