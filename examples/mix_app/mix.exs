defmodule MixApp.MixProject do
  use Mix.Project

  def project do
    [
      app: :mix_app,
      version: "1.0.0",
      elixir: "~> 1.14",
      # In a project of your own: {:macula, git: "https://git.example.org/macula.git"}
      deps: [{:macula, path: "../.."}]
    ]
  end

  def application, do: [extra_applications: [:logger]]
end
