"""What makes Keras' ``fit`` private: the promise, settings, refusals, the data, the steps and their backend, losses, and the callback."""
