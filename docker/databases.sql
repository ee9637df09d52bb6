-- Run once, when Postgres makes its volume; the database `prefect` is made by the image.
CREATE DATABASE mlflow;
