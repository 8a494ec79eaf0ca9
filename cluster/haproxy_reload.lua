-- Certificates of the faces, read again when their files change. Connections that are open keep
-- what they were shown; the next handshake shows the new one. What HAProxy does not take leaves the
-- old certificate in use, and is tried again once the files have changed again.

local admin_socket, period_s, pem, client_ca = ...
local TIMEOUT_S = 5

local function read(path)
  local file = io.open(path, "rb")
  if not file then
    return nil
  end
  local text = file:read("a")
  file:close()
  return text
end

local function read_pair()
  local certificate, key = read(pem), read(pem .. ".key")
  if not certificate or not key then
    return nil
  end
  -- One file may hold both.
  return certificate == key and certificate or certificate .. "\n" .. key
end

local function ask(command)
  local socket = core.tcp()
  socket:settimeout(TIMEOUT_S)
  if not socket:connect("unix@" .. admin_socket) then
    return "the admin socket does not answer"
  end
  socket:send(command .. "\n")
  local answer = socket:receive("*a")
  socket:close()
  return answer or "no answer"
end

local function put(kind, name, text)
  -- An empty line ends what is sent.
  local lines = text:gsub("\r", ""):gsub("\n\n+", "\n"):gsub("^\n", "")
  local answer = ask("set ssl " .. kind .. " " .. name .. " <<\n" .. lines .. "\n")
  if answer:find("created", 1, true) then
    answer = ask("commit ssl " .. kind .. " " .. name)
  end
  if answer:find("Success", 1, true) then
    core.Info("read again: " .. name)
  else
    ask("abort ssl " .. kind .. " " .. name)
    core.Warning("kept as it was: " .. name .. ": " .. answer)
  end
end

local watched = { { kind = "cert", name = pem, read = read_pair } }
if client_ca then
  local function read_ca()
    return read(client_ca)
  end
  table.insert(watched, { kind = "ca-file", name = client_ca, read = read_ca })
end
for _, file in ipairs(watched) do
  file.text = file.read()
end

core.register_task(function()
  while true do
    core.sleep(tonumber(period_s))
    for _, file in ipairs(watched) do
      local text = file.read()
      if text and text ~= file.text then
        file.text = text
        put(file.kind, file.name, text)
      end
    end
  end
end)
