"""One module for each file format of an adapter; its name is the name that users write under `output.formats`.

A format has (see `adapters.format.Format`):

* `SUFFIX`: what comes between the adapter's name and `.safetensors`;
* `FOLDS`: whether scales are multiplied into the tensors before they are written, as the format has no place for them;
* `HOLDS`: methods that it can carry, `dora`, `dora in a text encoder` and `tokens` (new words) among them;
* `matches(keys)`: whether a file with these tensor names is in this format;
* `to_tensors(artifact, names)`: the file's tensors and header;
* `from_tensors(tensors, header, names)`: the artifact again. It is total: a key that it does not know is an error;
* `seal(header, payload)`, if it has one: the header with what depends on the bytes of the tensors;
* instead of `to_tensors` and `from_tensors`, if an adapter is a folder: `FOLDER = True`, `to_folder(artifact, names)`
  and `from_folder(contents, names)`, by path in the folder.
"""
