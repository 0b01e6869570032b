"""What ``PrivacyEngine`` is made of: its promise, refusals, the watching of calls, the loader, and the check of the first step."""
