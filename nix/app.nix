# An app that runs a verb of the command line on the data of the flake.
{
  lib,
  writeShellScript,
  mnist,
  reproml,
}:
verb: description: {
  type = "app";
  program = "${writeShellScript "reproml-${verb}" ''
    export REPROML_DATA_DIR="''${REPROML_DATA_DIR:-${mnist}}"
    exec ${lib.getExe reproml} ${verb} "$@"
  ''}";
  meta = { inherit description; };
}
