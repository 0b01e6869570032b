"""What makes ``keras.Model.fit`` private: data read once, per-example losses, and one ``TrainingStep`` per Keras step."""
