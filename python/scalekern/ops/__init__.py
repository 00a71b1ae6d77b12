"""One module an op: public function, checks, schema, backends, fake, gradient."""
