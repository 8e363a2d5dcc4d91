"""One module for each Keras backend; `batchnorm.keras.functional` imports the active one."""
