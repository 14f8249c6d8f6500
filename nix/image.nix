# An OCI image of the installed package, for Docker, Podman and Apptainer:
#
#     $(nix build --no-link --print-out-paths .#image) | docker load
{
  lib,
  dockerTools,
  reproml,
  cuda,
}:
dockerTools.streamLayeredImage {
  name = "reproml";
  tag = "${reproml.version}${lib.optionalString cuda "-cuda"}";
  created = "1970-01-01T00:00:01Z"; # so that its digest depends on its content alone
  contents = [
    dockerTools.caCertificates # for the download of MNIST
    dockerTools.fakeNss # PyTorch asks for the user's name
  ];
  extraCommands = "mkdir -m 1777 tmp work";
  config = {
    Entrypoint = [ (lib.getExe reproml) ];
    WorkingDir = "/work";
    Env =
      [ "HOME=/tmp" ]
      ++ lib.optionals cuda [
        # What Docker's NVIDIA runtime and Apptainer's --nv put into the container: the driver.
        "NVIDIA_VISIBLE_DEVICES=all"
        "NVIDIA_DRIVER_CAPABILITIES=compute,utility"
        "LD_LIBRARY_PATH=/usr/lib64:/usr/lib/x86_64-linux-gnu:/.singularity.d/libs"
      ];
  };
}
