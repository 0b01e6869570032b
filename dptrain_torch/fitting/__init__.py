"""What ``PrivacyEngine`` needs around the step: the loader, and the check of the first step."""
