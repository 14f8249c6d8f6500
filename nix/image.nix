# An OCI image of the installed package, for Docker, Podman and Apptainer:
#
#     $(nix build --no-link --print-out-paths .#image) | docker load
#
# Its creation date is 1970, dockerTools' default, so that its digest depends on its content alone.
{
  lib,
  dockerTools,
  reproml,
  cuda,
}:
dockerTools.streamLayeredImage {
  name = "reproml";
  tag = "${reproml.version}${lib.optionalString cuda "-cuda"}";
  contents = [
    dockerTools.caCertificates # for the download of MNIST
    dockerTools.fakeNss
  ];
  extraCommands = "mkdir -m 1777 tmp work";
  config = {
    Entrypoint = [ (lib.getExe reproml) ];
    WorkingDir = "/work";
    Env =
      [
        "HOME=/tmp"
        "PATH=${reproml}/bin"
        "USER=reproml" # PyTorch asks for the user's name, whom /etc/passwd need not know
      ]
      ++ lib.optionals cuda [
        # What Docker's NVIDIA runtime and Apptainer's --nv put into the container: the driver.
        "NVIDIA_VISIBLE_DEVICES=all"
        "NVIDIA_DRIVER_CAPABILITIES=compute,utility"
        "LD_LIBRARY_PATH=/usr/lib64:/usr/lib/x86_64-linux-gnu:/.singularity.d/libs"
      ];
  };
}
